"""What a user can get wrong. The command line prints the message alone and exits with status 2."""


class UserError(ValueError):
    """One message: file, line or key; the value; the rule; the remedy."""
