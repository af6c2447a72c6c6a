from .attacking import attack as attack
from .record import Attack as Attack
from .record import Example as Example
from .record import FoolingFamily as FoolingFamily
from .record import Prediction as Prediction
from .record import RandomTrial as RandomTrial
from .record import Trial as Trial
from .text import attack_text as attack_text
