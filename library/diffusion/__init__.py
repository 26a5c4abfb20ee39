"""Noise schedules, prediction types and samplers, as functions without state."""
