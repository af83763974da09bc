"""Requests that their clients may come back to: kept here, told to other routers, gone on with by either.

app.py asks `Entrance`; core.py owns it with the store and the links to the peers.
"""

from shoal.router.resume.entrance import Entrance, asks_to_be_kept
from shoal.router.resume.kept import KeptRequest
from shoal.router.resume.store import KeptStore

__all__ = ["Entrance", "KeptRequest", "KeptStore", "asks_to_be_kept"]
