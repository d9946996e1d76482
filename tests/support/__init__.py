"""What the tests share: runs in forked processes, tiny models, trained models, watched scripts."""
