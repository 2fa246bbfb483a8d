"""Imported by the fork server alone: loads the peer (`preload.load_peer`)."""

from __future__ import annotations

from .preload import load_peer

load_peer()
