// A commit's file is as long as its meta page says, before the meta page says so.
//
// LMDB does not write a last page that a transaction took and gave back, so its file may be shorter
// than it claims to be. Nobody reads such a page, but a file that was cut off looks the same, and
// readers refuse it (environment.h). So the file is made longer in time: a process that dies
// between any two system calls of a commit leaves a file that is whole.
//
// mdb.c is compiled with `pwrite` renamed to the function below. With a system's LMDB the file is
// made longer after the commit (Environment::complete_file).
#pragma once

#include <sys/types.h>

#include <cstddef>

extern "C" {
// As pwrite(2). Before a meta page it makes `file` as long as that page says, on the disk too; if
// that fails, -1 and errno.
ssize_t mld_lmdb_pwrite(int file, const void* bytes, std::size_t count, off_t offset);
}
