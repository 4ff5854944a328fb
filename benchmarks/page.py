def of_ours(r):
    return False


def text_table(rows):
    return ""


def report(rows):
    pass
