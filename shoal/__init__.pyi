"""What type checkers see of __init__.py, which loads these names when they are first used."""

from shoal.llm import LLM as LLM
from shoal.types import LoRARequest as LoRARequest
from shoal.types import PoolingParams as PoolingParams
from shoal.types import RequestOutput as RequestOutput
from shoal.types import SamplingParams as SamplingParams
from shoal.version import __version__ as __version__
