from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pianodiff.generate import Piano as Piano

__version__ = "0.2.0"

SAMPLER, NUM_STEPS = "dpmpp_2m", 20  # what music is sampled with where neither you nor the model says otherwise
GUIDANCE, GUIDANCE_INTERVAL = 2.0, (0.2, 2.0)  # and how closely each block follows the last, at which noise levels


def __getattr__(name: str) -> Any:
    """`Piano`, once it is asked for: torch takes a while to import."""
    if name == "Piano":
        from pianodiff.generate import Piano

        return Piano
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
