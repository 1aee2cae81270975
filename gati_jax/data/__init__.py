"""Images from many sources, in named splits that are checked to be disjoint; many are read as they are needed."""

from .copies import check_distinct_rows as check_distinct_rows
from .copies import count_near_copies as count_near_copies
from .copies import fingerprint as fingerprint
from .groups import Groups as Groups
from .groups import as_groups as as_groups
from .groups import check_no_groups as check_no_groups
from .groups import check_whole_groups as check_whole_groups
from .sources import DATASET_NAME as DATASET_NAME
from .sources import Dataset as Dataset
from .sources import Reading as Reading
from .sources import load as load
from .sources import load_function as load_function
from .splits import Rows as Rows
from .splits import batches as batches
from .splits import check_disjoint as check_disjoint
from .splits import full_batches as full_batches
from .streaming import ImageRows as ImageRows
from .streaming import Images as Images
from .streaming import Source as Source
from .streaming import read_batches as read_batches
from .streaming import row_digests as row_digests
from .streaming import take as take
