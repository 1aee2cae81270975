"""What may answer early: predictors and selectors, joined into candidates."""

from .candidate import Candidate as Candidate
from .candidate import choose as choose
from .candidate import lookup as lookup
from .kinds import GridSpec as GridSpec
from .kinds import NetworkSpec as NetworkSpec
from .kinds import PredictorSpec as PredictorSpec
from .kinds import SelectorSpec as SelectorSpec
from .kinds import SortedSelectorSpec as SortedSelectorSpec
from .kinds import build_predictor as build_predictor
from .kinds import build_selector as build_selector
from .kinds import describe_predictor as describe_predictor
from .kinds import describe_selector as describe_selector
from .network import Network as Network
from .network import import_network as import_network
from .network import network_with_algorithms as network_with_algorithms
from .predictors import Conv as Conv
from .predictors import FullyConnected as FullyConnected
from .predictors import GlobalAverage as GlobalAverage
from .predictors import Grid as Grid
from .predictors import Pool as Pool
from .predictors import Predictor as Predictor
from .predictors import adaptive_average as adaptive_average
from .predictors import fold_standardize as fold_standardize
from .selectors import LinearSelector as LinearSelector
from .selectors import Selector as Selector
from .selectors import SortedSelector as SortedSelector
