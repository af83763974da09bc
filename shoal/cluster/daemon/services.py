"""All that a node daemon can be asked for. A part that asks daemons adds its services here."""

from __future__ import annotations

from typing import Any

from shoal.cluster.daemon.node_services import NODE_SERVICES
from shoal.cluster.daemon.wire import Service
from shoal.cluster.doctor.services import DOCTOR_SERVICES
from shoal.cluster.verify.service import HASH

SERVICES: tuple[Service[Any, Any], ...] = (*NODE_SERVICES, HASH, *DOCTOR_SERVICES)
