from .config import PRESETS as PRESETS
from .config import RECIPES as RECIPES
from .config import TrainConfig as TrainConfig
from .config import laptop_model as laptop_model
from .config import preset as preset
from .loop import evaluate_loss as evaluate_loss
from .loop import train as train
