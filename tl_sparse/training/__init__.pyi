from .config import TrainConfig as TrainConfig
from .config import laptop_model as laptop_model
from .loop import train as train
from .measures import evaluate_loss as evaluate_loss
from .presets import PRESETS as PRESETS
from .presets import RECIPES as RECIPES
from .presets import preset as preset
from .runs import config_of_run as config_of_run
