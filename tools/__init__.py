"""What people expect beyond the paper. The core never imports this package; scripts do, in the branch that needs it."""
