"""`python -m gkd_jax` is `gkd-jax`."""

from gkd_jax.main import main


if __name__ == "__main__":
    main()
