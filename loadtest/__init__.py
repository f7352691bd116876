"""Locust users and the reports."""
