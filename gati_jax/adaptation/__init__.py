"""Adaptation: what keeps a served bundle true to its traffic."""

from .points import Found as Found
from .points import Points as Points
from .points import PointsConfig as PointsConfig
from .points import threshold_for as threshold_for
from .repeats import Asked as Asked
from .repeats import Repeats as Repeats
from .repeats import RepeatsConfig as RepeatsConfig
from .trace import Trace as Trace
from .trace import load_trace as load_trace
from .trace import save_trace as save_trace
from .window import UNKNOWN as UNKNOWN
from .window import Block as Block
from .window import Window as Window
from .window import WindowConfig as WindowConfig
