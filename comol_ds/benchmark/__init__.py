"""Measurements that back the documentation's figures."""
