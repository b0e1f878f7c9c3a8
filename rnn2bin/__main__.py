"""`python -m rnn2bin` and `torchrun -m rnn2bin`."""

from rnn2bin.cli import main

if __name__ == "__main__":
    main()
