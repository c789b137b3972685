/* Encodes parsed JSON as BSON: many documents in one call, one after the other in one bytes object.
 *
 * The bytes are those that the driver's own encoder writes, at a quarter of its cost, since only what a JSON parser
 * returns has to be told apart: dict, list, str, int, float, bool and None, of exactly these types. For anything else an
 * exception is raised, and the caller leaves the documents to the driver, whose verdict counts. So there is no need for
 * good messages here.
 *
 * The documents belong to the calling thread alone, and no Python code runs while they are walked, so nothing changes
 * them, and borrowed references stay valid. BSON: https://bsonspec.org/spec.html
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if PY_BIG_ENDIAN
#error "numbers are copied as they lie in memory, and those of BSON are little-endian"
#endif

/* More levels than the server accepts, and few enough for any thread's stack. */
#define MAX_DEPTH 250

/* More than this comes from one long line. Lines of 1 MiB make less, even arrays of digits, so that their objects are gone
 * before the message is sent; with much longer ones, a copy beside the message would take more than it saves. */
#define MOST_BYTES (8 * 1024 * 1024)

/* The parser turns an integer that 64 bits cannot hold into a float of at least this. */
#define INT64_BOUND 9223372036854775808.0

#define FIRST_BYTES (64 * 1024)
#define IDENTITY_BYTES 12

enum {
    DOUBLE = 0x01,
    STRING = 0x02,
    DOCUMENT = 0x03,
    ARRAY = 0x04,
    OBJECT_ID = 0x07,
    BOOLEAN = 0x08,
    NULL_VALUE = 0x0a,
    INT32 = 0x10,
    INT64 = 0x12,
};

typedef struct {
    PyObject *id_key; /* "_id" */
} State;

/* What has been written so far, in a bytes object that grows; `bytes` is NULL after memory ran out. */
typedef struct {
    PyObject *bytes;
    Py_ssize_t used;
    Py_ssize_t size;
    int checked; /* whether a large float is one that was written as such */
} Buffer;

static int write_dict(Buffer *out, PyObject *dict, PyObject *own_id, int depth);
static int write_list(Buffer *out, PyObject *list, int depth);

static int grow(Buffer *out, Py_ssize_t count)
{
    Py_ssize_t size = out->size;

    if (count > MOST_BYTES - out->used) {
        PyErr_SetString(PyExc_OverflowError, "the documents are too large");
        return -1;
    }
    while (size < out->used + count) {
        size = size > MOST_BYTES / 2 ? MOST_BYTES : 2 * size;
    }
    if (_PyBytes_Resize(&out->bytes, size) < 0) {
        return -1;
    }
    out->size = size;
    return 0;
}

/* Where the next `count` bytes go, which count as written; NULL with an exception if there is no room for them. */
static inline char *reserve(Buffer *out, Py_ssize_t count)
{
    char *place;

    if (count > out->size - out->used && grow(out, count) < 0) {
        return NULL;
    }
    place = PyBytes_AS_STRING(out->bytes) + out->used;
    out->used += count;
    return place;
}

/* The length of what begins at `start` is written there. */
static inline void set_length(Buffer *out, Py_ssize_t start)
{
    int32_t length = (int32_t)(out->used - start);

    memcpy(PyBytes_AS_STRING(out->bytes) + start, &length, sizeof length);
}

/* The UTF-8 of a str: valid as long as that is. */
static inline const char *utf8(PyObject *text, Py_ssize_t *length)
{
    if (PyUnicode_IS_COMPACT_ASCII(text)) {
        *length = PyUnicode_GET_LENGTH(text);
        return (const char *)PyUnicode_1BYTE_DATA(text);
    }
    return PyUnicode_AsUTF8AndSize(text, length);
}

/* A byte for the type, which `write_value` sets, and the key with its NUL. Returns the position of the type. */
static inline Py_ssize_t write_key(Buffer *out, const char *key, Py_ssize_t length)
{
    Py_ssize_t at = out->used;
    char *place = reserve(out, length + 2);

    if (place == NULL) {
        return -1;
    }
    memcpy(place + 1, key, (size_t)length);
    place[length + 1] = '\0';
    return at;
}

static inline void set_type(Buffer *out, Py_ssize_t at, char type)
{
    PyBytes_AS_STRING(out->bytes)[at] = type;
}

static inline int write_number(Buffer *out, const void *number, Py_ssize_t size)
{
    char *place = reserve(out, size);

    if (place == NULL) {
        return -1;
    }
    memcpy(place, number, (size_t)size);
    return 0;
}

static inline int write_str(Buffer *out, PyObject *text)
{
    Py_ssize_t length;
    const char *bytes;
    char *place;
    int32_t written;

    /* Before its UTF-8 is made, which the str would keep. */
    if (PyUnicode_GET_LENGTH(text) > MOST_BYTES) {
        PyErr_SetString(PyExc_OverflowError, "a string is too large");
        return -1;
    }
    if ((bytes = utf8(text, &length)) == NULL || (place = reserve(out, length + 5)) == NULL) {
        return -1;
    }
    written = (int32_t)length + 1;
    memcpy(place, &written, sizeof written);
    memcpy(place + 4, bytes, (size_t)length);
    place[length + 4] = '\0';
    return 0;
}

/* The value, and its type at position `at`. */
static int write_value(Buffer *out, Py_ssize_t at, PyObject *value, int depth)
{
    PyTypeObject *type = Py_TYPE(value);

    if (type == &PyUnicode_Type) {
        set_type(out, at, STRING);
        return write_str(out, value);
    }
    if (type == &PyLong_Type) {
        int overflow;
        long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
        int32_t small = (int32_t)number;

        if (overflow) {
            PyErr_SetString(PyExc_OverflowError, "an integer exceeds 64 bits");
            return -1;
        }
        if (number == small) {
            set_type(out, at, INT32);
            return write_number(out, &small, sizeof small);
        }
        set_type(out, at, INT64);
        return write_number(out, &number, sizeof number);
    }
    if (type == &PyFloat_Type) {
        double number = PyFloat_AS_DOUBLE(value);

        if (!out->checked && (number >= INT64_BOUND || number <= -INT64_BOUND)) {
            PyErr_SetString(PyExc_OverflowError, "a float was perhaps an integer");
            return -1;
        }
        set_type(out, at, DOUBLE);
        return write_number(out, &number, sizeof number);
    }
    if (type == &PyBool_Type) {
        char truth = value == Py_True;

        set_type(out, at, BOOLEAN);
        return write_number(out, &truth, sizeof truth);
    }
    if (value == Py_None) {
        set_type(out, at, NULL_VALUE);
        return 0;
    }
    if (type == &PyDict_Type) {
        set_type(out, at, DOCUMENT);
        return write_dict(out, value, NULL, depth + 1);
    }
    if (type == &PyList_Type) {
        set_type(out, at, ARRAY);
        return write_list(out, value, depth + 1);
    }
    PyErr_Format(PyExc_TypeError, "a value is of type %s", type->tp_name);
    return -1;
}

/* All items of a dict but `own_id`, which has been written already. */
static int write_items(Buffer *out, PyObject *dict, PyObject *own_id, int depth)
{
    PyObject *key, *value;
    Py_ssize_t position = 0;

    while (PyDict_Next(dict, &position, &key, &value)) {
        Py_ssize_t at, length;
        const char *name;

        if (Py_TYPE(key) != &PyUnicode_Type) {
            PyErr_SetString(PyExc_TypeError, "a key is no str");
            return -1;
        }
        if (value == own_id && PyUnicode_CompareWithASCIIString(key, "_id") == 0) {
            continue;
        }
        if ((name = utf8(key, &length)) == NULL) {
            return -1;
        }
        if (memchr(name, '\0', (size_t)length) != NULL) {
            PyErr_SetString(PyExc_ValueError, "a key contains NUL");
            return -1;
        }
        if ((at = write_key(out, name, length)) < 0 || write_value(out, at, value, depth) < 0) {
            return -1;
        }
    }
    return 0;
}

/* Room for a length, which `end` fills in. Returns its position. */
static Py_ssize_t begin(Buffer *out, int depth)
{
    Py_ssize_t start = out->used;

    if (depth > MAX_DEPTH) {
        PyErr_SetString(PyExc_RecursionError, "too deep");
        return -1;
    }
    return reserve(out, 4) == NULL ? -1 : start;
}

static int end(Buffer *out, Py_ssize_t start)
{
    char *place = reserve(out, 1);

    if (place == NULL) {
        return -1;
    }
    *place = '\0';
    set_length(out, start);
    return 0;
}

static int write_dict(Buffer *out, PyObject *dict, PyObject *own_id, int depth)
{
    Py_ssize_t start = begin(out, depth);

    if (start < 0 || write_items(out, dict, own_id, depth) < 0) {
        return -1;
    }
    return end(out, start);
}

static int write_list(Buffer *out, PyObject *list, int depth)
{
    Py_ssize_t start = begin(out, depth), count = PyList_GET_SIZE(list), index;

    if (start < 0) {
        return -1;
    }
    for (index = 0; index < count; index++) {
        char digits[20]; /* of the index, which is the key, from the right */
        char *first = digits + sizeof digits;
        Py_ssize_t left = index, at;

        do {
            *--first = (char)('0' + left % 10);
            left /= 10;
        } while (left);
        at = write_key(out, first, digits + sizeof digits - first);
        if (at < 0 || write_value(out, at, PyList_GET_ITEM(list, index), depth) < 0) {
            return -1;
        }
    }
    return end(out, start);
}

/* A document, its `_id` first: its own if it has one, else the identity. Returns whether it is its own, -1 on errors. */
static int write_document(Buffer *out, PyObject *id_key, PyObject *document, const char *identity)
{
    PyObject *own_id;
    Py_ssize_t start, at;

    if (Py_TYPE(document) != &PyDict_Type) {
        PyErr_SetString(PyExc_TypeError, "a document is no dict");
        return -1;
    }
    own_id = PyDict_GetItemWithError(document, id_key);
    if (own_id == NULL && PyErr_Occurred()) {
        return -1;
    }
    if ((start = begin(out, 0)) < 0 || (at = write_key(out, "_id", 3)) < 0) {
        return -1;
    }
    if (own_id == NULL) {
        set_type(out, at, OBJECT_ID);
        if (write_number(out, identity, IDENTITY_BYTES) < 0) {
            return -1;
        }
    }
    else if (write_value(out, at, own_id, 0) < 0) {
        return -1;
    }
    if (write_items(out, document, own_id, 0) < 0 || end(out, start) < 0) {
        return -1;
    }
    return own_id != NULL;
}

static int append_index(PyObject *list, Py_ssize_t index)
{
    PyObject *number = PyLong_FromSsize_t(index);
    int failed;

    if (number == NULL) {
        return -1;
    }
    failed = PyList_Append(list, number);
    Py_DECREF(number);
    return failed;
}

static PyObject *encode(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
    State *state = PyModule_GetState(module);
    Buffer out = {NULL, 0, FIRST_BYTES, 0};
    PyObject *documents, *identities, *own_ids, *result = NULL;
    Py_ssize_t index;

    if (count != 3 || !PyList_CheckExact(arguments[0]) || !PyBytes_CheckExact(arguments[1])
        || !PyBool_Check(arguments[2])) {
        PyErr_SetString(PyExc_AssertionError, "encode() takes a list, bytes and a bool");
        return NULL;
    }
    documents = arguments[0];
    identities = arguments[1];
    out.checked = arguments[2] == Py_True;
    if (PyBytes_GET_SIZE(identities) / IDENTITY_BYTES != PyList_GET_SIZE(documents)
        || PyBytes_GET_SIZE(identities) % IDENTITY_BYTES != 0) {
        PyErr_SetString(PyExc_AssertionError, "encode() takes 12 bytes for each document");
        return NULL;
    }
    if ((own_ids = PyList_New(0)) == NULL) {
        return NULL;
    }
    if ((out.bytes = PyBytes_FromStringAndSize(NULL, out.size)) == NULL) {
        goto done;
    }
    for (index = 0; index < PyList_GET_SIZE(documents); index++) {
        int own = write_document(&out, state->id_key, PyList_GET_ITEM(documents, index),
                                 PyBytes_AS_STRING(identities) + IDENTITY_BYTES * index);

        if (own < 0 || (own && append_index(own_ids, index) < 0)) {
            goto done;
        }
    }
    if (_PyBytes_Resize(&out.bytes, out.used) == 0) {
        result = PyTuple_Pack(2, out.bytes, own_ids);
    }
done:
    Py_XDECREF(out.bytes);
    Py_DECREF(own_ids);
    return result;
}

static int execute(PyObject *module)
{
    State *state = PyModule_GetState(module);

    state->id_key = PyUnicode_InternFromString("_id");
    return state->id_key == NULL ? -1 : 0;
}

static int traverse(PyObject *module, visitproc visit, void *arg)
{
    Py_VISIT(((State *)PyModule_GetState(module))->id_key);
    return 0;
}

static int clear(PyObject *module)
{
    Py_CLEAR(((State *)PyModule_GetState(module))->id_key);
    return 0;
}

static void release(void *module)
{
    (void)clear(module);
}

static PyMethodDef methods[] = {
    {"encode", (PyCFunction)(void (*)(void))encode, METH_FASTCALL,
     "encode(documents, identities, checked, /)\n--\n\nBSON of the documents, and the indexes of those with an _id of their own."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_bson", "Encodes parsed JSON as BSON.", sizeof(State), methods, slots, traverse, clear, release,
};

PyMODINIT_FUNC PyInit__bson(void)
{
    return PyModuleDef_Init(&module);
}
