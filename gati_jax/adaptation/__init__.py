"""Keeps a served bundle true to its traffic."""

from .monitor import Alarm as Alarm
from .monitor import Monitor as Monitor
from .monitor import MonitorConfig as MonitorConfig
from .monitor import Watched as Watched
from .observed import REPEATED as REPEATED
from .observed import Observed as Observed
from .sequential import SequentialCertifier as SequentialCertifier
