export PYTHONUNBUFFERED=1 FLASHCORE_COMMIT=$1
nvidia-smi --query-gpu=name --format=csv,noheader | head -1
for t in main mo o; do P=$PWD; [ $t != main ] && P=$PWD/.rows/$t
PYTHONPATH=$P TRITON_CACHE_DIR=/tmp/t2$t timeout 60 python3 .trial/ragged.py ragged_$t > /tmp/ragged_$t.log 2>&1; echo "ragged $t $? $SECONDS"
done
cd .trial; PYTHONPATH=..:. timeout 60 python3 long2.py > /tmp/long2.log 2>&1; echo "long2 $? $SECONDS"
for f in ragged_main ragged_mo ragged_o long2; do echo "== $f"; tail -c 9000 /tmp/$f.log; done > $OUT/logs.txt
tail -20 /tmp/long2.log
ls $OUT
