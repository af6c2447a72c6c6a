from .efforts import FULL as FULL
from .efforts import QUICK as QUICK
from .efforts import Effort as Effort
