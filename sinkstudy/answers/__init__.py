"""Questions, and a model's answers to them, with or without interventions."""
