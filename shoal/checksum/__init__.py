"""SHA-256 of files: which files of a directory count, their sums in parallel and from a cache, and lists of sums."""

from shoal.checksum.cache import SumCache, default_cache_directory
from shoal.checksum.files import Listing, list_files
from shoal.checksum.hashing import TreeSums, default_num_jobs, hash_files, hash_tree
from shoal.checksum.sums import escape_name, format_sum, parse_sums

__all__ = [
    "Listing",
    "SumCache",
    "TreeSums",
    "default_cache_directory",
    "default_num_jobs",
    "escape_name",
    "format_sum",
    "hash_files",
    "hash_tree",
    "list_files",
    "parse_sums",
]
