from .terminal.commands import main

main()
