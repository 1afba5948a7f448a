"""From an untouched Pyro model to a frozen description of it: capture, roles, recognition, plan."""
