"""The critic: its model, and how it is trained beside the policy."""
