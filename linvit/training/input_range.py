"""`--input-range auto`: the values that the 16-bit training images use, measured once, before the run."""

from linvit.data.sources.base import ImageSet
from linvit.data.value_range import measure_input_range
from linvit.distributed import Ranks
from linvit.training.batch_size import recorded_setting
from linvit.training.config import TrainConfig
from linvit.training.log import print_line


def resolve_input_range(config: TrainConfig, train_set: ImageSet, ranks: Ranks) -> TrainConfig:
    """Replace `input_range` "auto" by two numbers: those of the resumed run, else the images' lowest and highest value.

    Without 16-bit images it becomes None. All processes measure the same images, and so find the same numbers.
    """
    if config.input_range != "auto":
        return config
    recorded = recorded_setting(config, "input_range")
    if isinstance(recorded, list):
        return config.model_copy(update={"input_range": tuple(recorded)})
    found, num_images = measure_input_range(train_set)
    if ranks.is_primary:
        measured = "none of the images has 16 bits" if found is None else f"{found[0]} {found[1]}"
        print_line(f"--input-range auto: {measured}" + (f" (from {num_images:,} images)" if found else ""))
    return config.model_copy(update={"input_range": found})
