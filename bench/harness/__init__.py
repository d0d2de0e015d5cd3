"""The benchmark: chains of proxies side by side, the same load through each, one table."""
