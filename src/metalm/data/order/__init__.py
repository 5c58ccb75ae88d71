"""Which sample comes when, and random draws by address."""
