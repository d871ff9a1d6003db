__all__: list[str]

from .errors import BadInput as BadInput
from .errors import DoesNotFit as DoesNotFit
from .errors import GradcostError as GradcostError
from .errors import MissingExtra as MissingExtra
from .errors import Unsupported as Unsupported
from .finite import NotFinite as NotFinite
from .key import Key as Key
from .note import Note as Note
from .objective import Leaf as Leaf
from .objective import Objective as Objective
from .value import value as value
