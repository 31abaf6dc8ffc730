"""The parts of the loopback Hub; tests import `HubServer` from `servers.hub`, next door."""
