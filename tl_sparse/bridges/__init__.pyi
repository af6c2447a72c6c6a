from .config import BridgeConfig as BridgeConfig
from .loading import load_bridges as load_bridges
from .losses import BridgeLosses as BridgeLosses
from .losses import SiteLosses as SiteLosses
from .maps import Maps as Maps
from .pair import Bridges as Bridges
from .train import bridge_config_of_run as bridge_config_of_run
from .train import train_bridges as train_bridges
