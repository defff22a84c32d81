"""The server of the digit page and its JSON API: socket, guard, application, and the thread that reads digits.

Its libraries come with the extra `app`; the page's files are in tinyvit/page/.
"""
