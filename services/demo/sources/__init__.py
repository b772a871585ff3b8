"""Readers of the packages that the demo's facts come from (extra `demo`); nothing else in the project imports them."""
