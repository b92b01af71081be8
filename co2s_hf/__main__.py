"""`python -m co2s_hf COMMAND` and `accelerate launch -m co2s_hf COMMAND`: the same as `co2s COMMAND`."""

from .cli import main


main()
