"""How a bundle answers some images: agreement, accuracy, exits and time."""

from .records import Evaluation as Evaluation
from .run import evaluate as evaluate
