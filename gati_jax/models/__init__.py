"""The base: chains of blocks, residual networks as chains, their weights."""

from .chain import Block as Block
from .chain import Chain as Chain
from .chain import Normalization as Normalization
from .chain import check_images as check_images
from .convolution import ALGORITHMS as ALGORITHMS
from .convolution import Algorithm as Algorithm
from .layers import Layer as Layer
from .layers import choose_algorithms as choose_algorithms
from .layers import fast_forward as fast_forward
from .layers import layers as layers
from .layers import store_params as store_params
from .layers import winograd_where_wide as winograd_where_wide
from .layers import with_algorithms as with_algorithms
from .resnet import NAMES as NAMES
from .resnet import ResNet as ResNet
from .resnet import Variables as Variables
from .resnet import apply as apply
from .resnet import apply_train as apply_train
from .resnet import fold as fold
from .resnet import init as init
from .resnet import resnet as resnet
from .resnet import to_chain as to_chain
from .weights import export_state_dict as export_state_dict
from .weights import import_state_dict as import_state_dict
from .weights import read_metadata as read_metadata
from .weights import read_weights as read_weights
