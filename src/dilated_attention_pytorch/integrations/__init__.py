"""Bridges to other libraries, one package each; nothing is loaded before its package is imported."""
