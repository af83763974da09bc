"""Who may have a request forwarded, and when: keys, limits per minute, the queue. Pure: time is an argument.

Order of use, for one request: `ApiKeys.authenticate` → `ApiKey.check_model` → `RateLimits.charge` →
`async with AsyncAdmission.admit(entry)` around the forwarding → `RateLimits.correct`.
"""

from shoal.router.admission.asynchronous import AsyncAdmission
from shoal.router.admission.entry import Entry, EntryState
from shoal.router.admission.keys import ApiKey, ApiKeys, read_api_keys
from shoal.router.admission.queue import AdmissionQueue, QueueLimits
from shoal.router.admission.rate_limit import Charge, RateLimits

__all__ = [
    "AdmissionQueue",
    "ApiKey",
    "ApiKeys",
    "AsyncAdmission",
    "Charge",
    "Entry",
    "EntryState",
    "QueueLimits",
    "RateLimits",
    "read_api_keys",
]
