"""Methods that are trained: connectors, routers, gates, and the loop that trains them."""
