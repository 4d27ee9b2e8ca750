"""`python -m ft_launcher` is the command ft_launcher."""

from ft_launcher.launcher import main

main()
