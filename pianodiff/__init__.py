__version__ = "0.1.0"

SAMPLER, NUM_STEPS = "dpmpp_2m", 12  # what music is sampled with where nothing else is said; chapter 7 has the evidence
