// What the core keeps once a process, and what a fork does to it.
//
// A forked child gets fresh, empty state; everything it inherited is inert: it is recognised by its
// generation, never used, and leaked rather than destroyed (LMDB forbids touching an inherited
// environment, the writer thread is gone, the ring's memory is not there).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace mld {

class Environment;
class Runtime;
class StoreState;

using FileId = std::pair<std::uint64_t,
                         std::uint64_t>;  // device, inode: a path may be a symlink or a bind mount

struct Process {
  std::mutex stores_mutex;
  std::map<FileId, std::weak_ptr<StoreState>>
      stores;  // protected by stores_mutex; by the directory's identity

  std::mutex runtime_mutex;
  std::weak_ptr<Runtime> runtime;  // protected by runtime_mutex

  // Held while an environment is opened or closed: closing one handle of a file drops all POSIX
  // locks on it, so open and close of one environment must never overlap.
  std::mutex environments_mutex;
  std::map<FileId, std::weak_ptr<Environment>>
      environments;  // protected by environments_mutex; by data.mdb's identity
};

// The calling process's state. Installs the fork handler when first called.
Process& process();

// Counts forks: 0 in the first process, one more in each forked child. An object that remembers
// another value is inert.
std::uint64_t process_generation() noexcept;

// A descriptor that holds an flock. A forked child closes its copy at once: a lock belongs to the
// open file description, so an orphaned child would keep its dead parent's trace locked.
void guard_lock_descriptor(int descriptor);
void unguard_lock_descriptor(int descriptor);

// Kernel's id of the current boot; empty where there is none.
const std::string& boot_id();

}  // namespace mld
