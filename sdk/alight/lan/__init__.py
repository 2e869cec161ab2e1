"""The local network: find alight servers, and talk to them as if their models were here."""
