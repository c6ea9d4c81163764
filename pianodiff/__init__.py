__version__ = "0.1.0"

SAMPLER, NUM_STEPS = "dpmpp_2m", 15  # what music is sampled with where nothing else is said; chapter 7 has the evidence
GUIDANCE, GUIDANCE_INTERVAL = 3.0, (0.2, 2.0)  # and how closely each block follows the last, at which noise levels
