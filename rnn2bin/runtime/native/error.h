#ifndef RNN2BIN_ERROR_H
#define RNN2BIN_ERROR_H

/* Sets r2b_last_error() of this thread; returns -1. */
__attribute__((format(printf, 1, 2))) int fail(const char *format, ...);

#endif
