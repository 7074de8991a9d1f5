// Calls from C what Emscripten leaves to JavaScript, so that its answers can be compared with ours.
//
// Debian 12's emscripten 3.1.6, with NODE_PATH=/usr/share/nodejs:
//   mkdir assets; printf 'hello preload archive' > assets/data.gz; printf second > assets/two.txt
//   emcc emscripten_probe.cpp -O3 -sMODULARIZE=1 -sALLOW_MEMORY_GROWTH=1 -sMAXIMUM_MEMORY=2GB -sENVIRONMENT=node
//     -sEXPORTED_FUNCTIONS=_malloc,_free -sEXPORTED_RUNTIME_METHODS=UTF8ToString,stringToUTF8
//     --preload-file assets/data.gz@/assets/data.gz --preload-file assets/two.txt@/assets/sub/two.txt -o probe.js
// The three files that this makes, zipped, are packages/emscripten-probe.zip; emscripten_probe.js asks it.
#include <emscripten.h>
#include <errno.h>
#include <fcntl.h>
#include <stdexcept>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#define KEEP extern "C" EMSCRIPTEN_KEEPALIVE

extern char **environ;
static struct tm T;
static char buf[65536];
static int answer(int result) { return result < 0 ? -errno : result; }

KEEP int *tm_ptr() { return (int *)&T; }
KEEP char *buf_ptr() { return buf; }
KEEP void do_localtime(int t) { time_t x = t; localtime_r(&x, &T); }
KEEP void do_gmtime(int t) { time_t x = t; gmtime_r(&x, &T); }
KEEP int do_mktime() { return (int)mktime(&T); }
KEEP int do_timegm() { return (int)timegm(&T); }
KEEP int do_strftime(const char *format, int room) { T.tm_zone = "XYZ"; return strftime(buf, room, format, &T); }
KEEP int do_strptime(const char *s, const char *format) { char *r = strptime(s, format, &T); return r ? r - s : -1; }
KEEP char *do_tz() {
  tzset();
  snprintf(buf, sizeof buf, "%ld|%d|%s|%s", timezone, daylight, tzname[0], tzname[1]);
  return buf;
}
KEEP int do_open(const char *path, int flags) { return answer(open(path, flags, 0666)); }
KEEP int do_read(int fd, int n) { return answer(read(fd, buf, n)); }
KEEP int do_write(int fd, int n) { return answer(write(fd, buf, n)); }
KEEP int do_seek(int fd, int offset, int whence) { return answer(lseek(fd, offset, whence)); }
KEEP int do_close(int fd) { return answer(close(fd)); }
KEEP int do_fcntl(int fd, int command, int argument) { return answer(fcntl(fd, command, argument)); }
KEEP int do_ioctl(int fd, int request) { int x[32]; return answer(ioctl(fd, request, x)); }
KEEP char *do_env() {
  buf[0] = 0;
  for (char **each = environ; *each; each++) { strcat(buf, *each); strcat(buf, "\n"); }
  return buf;
}
KEEP int do_entropy(int n) { return getentropy(buf, n); }
KEEP void *do_malloc(unsigned n) { char *p = (char *)malloc(n); if (p) p[n - 1] = 1; return p; }

struct Mine : std::runtime_error { int x; Mine() : std::runtime_error("derived from one with a text"), x(1) {} };
namespace deep {
struct Odd : std::exception {
  int id = 7;
  std::runtime_error m{"held inside of another"};
  const char *what() const noexcept override { return m.what(); }
};
}
struct Plain { int a = 5; };
KEEP void do_throw(int kind) {
  switch (kind) {
    case 0: throw std::runtime_error("bad thing happened");
    case 1: throw std::logic_error("illogical, and long enough not to fit anywhere");
    case 2: throw std::invalid_argument("x");
    case 3: throw 42;
    case 4: throw "a literal";
    case 5: throw std::string("a string that does not fit inside of it");
    case 6: throw std::string("short");
    case 7: throw Mine();
    case 8: throw deep::Odd();
    case 9: throw Plain();
    case 10: throw std::bad_alloc();
    case 11: throw 3.5;
    case 12: throw std::out_of_range("");
    case 13: abort();
    case 14: exit(3);
  }
}

// So that it looks like a model.
KEEP void *construct() { return &T; }
KEEP int node_calc_v3(int, int, int, int) { return 0; }
