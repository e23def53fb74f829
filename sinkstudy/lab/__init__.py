"""How the lab's models are made, and whether they hold what they must."""
