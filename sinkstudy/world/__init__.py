"""The lab's world: scenes, and questions whose answers and types are known by construction."""
