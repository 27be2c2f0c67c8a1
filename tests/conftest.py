def pytest_configure(config):
    config.addinivalue_line('markers', 'slow: takes minutes; `make test` leaves it out, `make test-all` runs it')
