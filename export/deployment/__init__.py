"""Deployment computed from what was measured: chart values with their reasons, calendars, validation, differences."""
