"""Adaptation: what keeps a served bundle true to its traffic."""

from .monitor import Alarm as Alarm
from .monitor import Monitor as Monitor
from .monitor import MonitorConfig as MonitorConfig
from .monitor import Watched as Watched
from .observed import REPEATED as REPEATED
from .observed import Observed as Observed
from .pace import Pace as Pace
from .sequential import SequentialCertifier as SequentialCertifier
from .trial import Trial as Trial
from .trial import TrialConfig as TrialConfig
from .trial import Verdict as Verdict
from .updater import UpdateConfig as UpdateConfig
from .updater import costs_of as costs_of
from .updater import examine as examine
from .updater import refit_caches as refit_caches
from .updater import replan as replan
from .updater import standing_cascade as standing_cascade
from .updater import updated as updated
from .versions import Loaded as Loaded
from .versions import Versions as Versions
